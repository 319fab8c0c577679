"""Text to token ids and back, as the model file describes it; chat templates."""

from isotherm.tokenization.tokenizer import Detokenizer, Tokenizer, build_tokenizer

__all__ = ["Detokenizer", "Tokenizer", "build_tokenizer"]
