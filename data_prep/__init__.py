"""Datasets of bullet chats: crawling, cleaning, labelling, splitting, auditing and reading them."""
