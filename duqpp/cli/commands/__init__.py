"""The commands: each calls one function of the library, and prints what it returns."""
