"""Offsite-Tuning: a lossy stand-in for the middle layers, made, distilled, packed and plugged in. No network."""
