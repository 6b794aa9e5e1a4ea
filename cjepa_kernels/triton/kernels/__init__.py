"""The functions that run on the GPU. The modules beside this folder launch them.

Letters in all of them: X (M, D) and Y (N, D) are the packed rows of both sides, S = X Y^T their
similarities, tau the temperature. a is a row of S, b a column, i a block of rows, j a block of
columns. SELF is true where X and Y are the same rows. VIEWS is the number of views of which they
are made. Two views are interleaved: with SELF the positive of row a is then row a ^ 1.
"""
