"""One file per objective. See `base.py` for the contract."""
