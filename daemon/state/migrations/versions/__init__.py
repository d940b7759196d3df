"""One file for each change of the schema, named by its number. What a release has shipped is never edited."""
