"""Other trainers on the launcher's own work: the same tokens, model, precision and global batch."""
