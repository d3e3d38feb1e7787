"""The one place that knows versions of fairseq, hydra and torch: safe checkpoint loading, repairs of stock code, launch checks.

Loading runs no code from a file. `load_checkpoint` needs no fairseq; `install` gives the same to stock fairseq, so that
`fairseq-generate`, `w2v_path` and resuming work on torch >= 2.6.
"""

from s3distill.compat.loading import checkpoint_size, load_checkpoint, write_checkpoint
from s3distill.compat.repairs import fairseq_usable, import_shells, install
from s3distill.compat.starts import starts_from_another_run

__all__ = [
    "checkpoint_size",
    "fairseq_usable",
    "import_shells",
    "install",
    "load_checkpoint",
    "starts_from_another_run",
    "write_checkpoint",
]
