"""Operations of the library, the points at which CPython can run other code in them, and the legal end states."""
