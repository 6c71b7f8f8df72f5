"""A polite, resumable client for bullet chats, and a fake site to try it on."""
