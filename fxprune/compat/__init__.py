"""Names of other libraries over fxprune, for code that was written against them."""
