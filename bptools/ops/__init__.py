"""The ops: one file per family, each with its derivation, its forward, its backward and its Function."""
