/** Light and dark: as the system says, until the button is used. */

const STORED = "sfl-theme";

/** @param {HTMLButtonElement} button */
export function startTheme(button) {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const show = () => {
    const name = localStorage.getItem(STORED) ?? (system.matches ? "dark" : "light");
    document.documentElement.dataset.theme = name;
    button.setAttribute("aria-pressed", String(name === "dark"));
  };
  button.addEventListener("click", () => {
    const isDark = document.documentElement.dataset.theme === "dark";
    localStorage.setItem(STORED, isDark ? "light" : "dark");
    show();
  });
  system.addEventListener("change", () => {
    localStorage.removeItem(STORED); // the system was changed after the button
    show();
  });
  show();
}
