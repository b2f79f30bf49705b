"""Keeps what a user of the commands can do nothing about out of their output."""

from __future__ import annotations

import logging
import warnings

# (category, start of the message, module that warns)
NOT_FOR_USERS: list[tuple[type[Warning], str, str]] = [
    # Lightning 2.6 compares with a class that torch 2.14 deprecates.
    (FutureWarning, r"`isinstance\(treespec, LeafSpec\)` is deprecated", r"lightning\.pytorch\.utilities\._pytree"),
    # Lightning 2.6 calls what jsonargparse 4.49 deprecates.
    (DeprecationWarning, "", r"lightning\.pytorch\.cli"),
    # Every run has a folder of its own, so that of the checkpoint is always another.
    (UserWarning, "The dirpath has changed from", r"lightning\.pytorch\.callbacks\.model_checkpoint"),
    # A data module without validation classes has no validation loader.
    (UserWarning, "Total length of `list` across ranks is zero", r"lightning\.pytorch\.utilities\.data"),
    # torch 2.10 reads an exported program from a buffer that cannot be written, and does not write it.
    (UserWarning, "The given buffer is not writable", r"torch\.export\.pt2_archive\._package"),
    # Frozen batch norms stay in evaluation mode, as the option asks.
    (UserWarning, r"Found \d+ module\(s\) in eval mode", r"lightning\.pytorch\.loops\.fit_loop"),
]


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless cloud" not in record.getMessage()


def hide_what_users_cannot_change() -> None:
    """Ignore the warnings of `NOT_FOR_USERS`, and the lines in which Lightning advertises other products.

    Warnings of this package, and those that name something a user can change, stay.
    """
    for category, message, module in NOT_FOR_USERS:
        warnings.filterwarnings("ignore", message, category, module)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
