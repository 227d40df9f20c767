"""`python -m mmfuse`, the form that `accelerate launch -m` needs."""

from mmfuse.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
