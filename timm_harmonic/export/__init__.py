"""Folders for the Hugging Face Hub with their cards, and ONNX files."""
