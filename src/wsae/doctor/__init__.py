"""Pre-flight checks: will this model, text and configuration work here, and what will they cost?"""
