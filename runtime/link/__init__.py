"""Between front processes and the engine's: messages, and who sends them."""
