"""Self-supervised training on raw text: sft's loss, with every token supervised (data.render does that for all of a {"text"} row, and for
the turns of a chat under loss_on = "all")."""

from training.objectives.sft import loss, prepare

__all__ = ["loss", "prepare"]
