"""What is learned: the model, its objective, its optimizer and its schedules."""
