"""What a batch is: audio files, their index, length batches, masks and loaders."""
