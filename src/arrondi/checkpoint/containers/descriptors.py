"""What to do when the process has no file descriptor left.

Owns: `reraise_exhaustion`. Nothing in this package keeps a file open between calls, so a lack of descriptors is never the
fault of the file at hand, and no reader may call that file broken.
"""

from __future__ import annotations

import errno


def reraise_exhaustion(error: BaseException) -> None:
    """Raise `error` as it is if it says that no descriptor is left, else do nothing."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        raise error
