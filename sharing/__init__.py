"""Sharing on the Hub: what is pushed, its card, the upload, the check by loading back, and collections."""
