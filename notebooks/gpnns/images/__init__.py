"""Images by name, and of one's own: folders, tables, tars."""
