"""Log Z and messages in float32, for devices without fast float64; see `passes`."""
