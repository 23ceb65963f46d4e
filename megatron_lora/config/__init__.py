"""What a user may say, and how a mistake is reported."""
