"""What people label in a text, as text that a model can be trained on."""
