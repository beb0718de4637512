"""The study of one model that reads text and answers look-ups: where its passes go, and what they give."""
