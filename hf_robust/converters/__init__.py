"""Converters: robust networks in the formats of their authors become folders that transformers and timm load."""

from __future__ import annotations

from .base import Conversion, Converter
from .converting import Converted, convert
from .formats import format_names, load_converter, recognise

__all__ = ["Conversion", "Converted", "Converter", "convert", "format_names", "load_converter", "recognise"]
