"""What a trained model gives: embeddings of anything that it reads."""
