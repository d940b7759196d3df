"""The endpoints of Tinker's API, and the hub of tokenizers: what a request asks, made into promises and answers.

They may import all of `isthmus.daemon.tinker` but `tinker_routes`, which puts them together.
"""
