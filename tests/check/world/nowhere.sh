#!/opt/nowhere/bin/python -u
print(1)
