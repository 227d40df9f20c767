#!/usr/bin/env bash
# Prints the quick start's strategy: zero2, or ddp where DeepSpeed cannot run (on CPU it compiles a library with g++).
set -euo pipefail
if ! nvidia-smi -L 2>/dev/null | grep -q '^GPU' && ! command -v g++ >/dev/null; then
  echo "no GPU and no g++: DeepSpeed cannot be compiled here, so the quick start uses DDP" >&2
  echo ddp
else
  echo zero2
fi
