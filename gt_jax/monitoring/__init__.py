"""What a run says of itself: metrics, alerts in words, pictures, TensorBoard, and the report of several runs."""
