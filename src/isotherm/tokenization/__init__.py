"""Text to token ids and back, as the model file describes it; chat templates."""

from isotherm.tokenization.chat import ChatTemplate, chat_template_for
from isotherm.tokenization.tokenizer import Detokenizer, Tokenizer, build_tokenizer

__all__ = ["ChatTemplate", "Detokenizer", "Tokenizer", "build_tokenizer", "chat_template_for"]
