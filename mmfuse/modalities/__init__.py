"""One file per modality: its settings, its bytes-to-tensors processor, its encoder. See `base.py` for the contract."""
