"""The checks, by what they look at; each is one function that asks one question."""
