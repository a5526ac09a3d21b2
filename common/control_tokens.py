"""The control tokens of Gemma's chat format, as tokenizer.json spells them; model/tokenizer.py shows it."""

START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"
CONTROL_TOKENS = ("<bos>", "<eos>", "<pad>", START_OF_TURN, END_OF_TURN)
