"""``doratune report``: what was tuned, what it brought, how it was found, and what is not known, as one page.

``data`` gathers typed values from stores, studies and results files; ``sections`` makes a document of words, tables and
plots from them; ``page``, ``markdown`` and ``images`` write it out.
"""
