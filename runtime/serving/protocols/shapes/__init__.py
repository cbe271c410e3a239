"""The shapes of answers, for the server's description of itself.

Answers are plain data, encoded as they are; tests hold them to these.
"""
