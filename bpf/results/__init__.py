"""What goes out: saved models and what they say, tables for other programs, TensorBoard, dashboard, notifications."""
