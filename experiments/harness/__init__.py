"""What all measurements share: commands of settings, clouds and other processes, memory, finished work on disk, data.

May import no other package of `isthmus.experiments`. `command`, `bench_flags`, `bench_settings` and `emulator_settings`
import nothing heavy, so that `--help` answers at once.
"""
