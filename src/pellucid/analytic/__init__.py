"""Models fitted in closed form or by iteration: scikit-learn estimators on the same objectives and steps."""
