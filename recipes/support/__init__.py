"""What the recipes share: options from a file and the command line, models, chats, and the report of a run."""
