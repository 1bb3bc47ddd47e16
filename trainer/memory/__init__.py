"""What a run needs of a card's memory and of the host's, counted without either."""
