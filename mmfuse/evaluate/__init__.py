"""What a trained model is worth, and a page that shows it."""
