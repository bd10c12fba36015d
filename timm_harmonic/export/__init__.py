"""Repositories of the Hugging Face Hub: folders from checkpoints or compressed networks, cards, publishing."""
