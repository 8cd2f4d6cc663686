"""Answers read back: content, thoughts and calls of tools, in the model's own format, as they come."""

from ggmq.answers.formats import AnswerFormat
from ggmq.answers.pieces import Answer, Call, Content, Piece, Reasoning, ToolCall
from ggmq.answers.reader import AnswerReader

__all__ = ["Answer", "AnswerFormat", "AnswerReader", "Call", "Content", "Piece", "Reasoning", "ToolCall"]
