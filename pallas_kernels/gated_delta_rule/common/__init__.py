"""What the implementations of this operation share."""
