"""Answers that hold a grammar, of a server in processes of its own, against judges that nobody here wrote."""
