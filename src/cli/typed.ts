/** How the commands are typed here: in a checkout, where Node runs the sources, by its scripts; elsewhere as those of a package. */
const isCheckout = import.meta.filename.endsWith('.ts')

export const edgemeshTyped = isCheckout ? 'npm run --silent edgemesh --' : 'npx edgemesh'

/** What starts a server that needs nothing. */
export const startTyped = isCheckout ? 'npm start' : 'npx edgemesh dev'
