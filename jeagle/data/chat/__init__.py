"""From conversations to token ids and loss masks: chat templates, rendering, and the positions of tokens in a text."""
