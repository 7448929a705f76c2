"""How other tools write dialogues, as the messages of chat APIs."""
