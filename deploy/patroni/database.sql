-- The database and its two roles, once, at the primary. Passwords come from the environment, so that no command line and no log has them:
--   sudo -u postgres EDGEMESH_PASSWORD=… EDGEMESH_OWNER_PASSWORD=… psql -X -p 5432 -f database.sql
-- Better, from a file that is sourced. Servers come as edgemesh; `edgemesh migrate up` as edgemesh_owner: docs/audit.md.
\set ON_ERROR_STOP on
\getenv password EDGEMESH_PASSWORD
\getenv owner_password EDGEMESH_OWNER_PASSWORD
set log_statement = 'none';
set log_min_error_statement = 'panic';
set log_min_duration_statement = -1;
create role edgemesh_owner login password :'owner_password';
create role edgemesh login password :'password';
create database edgemesh owner edgemesh_owner;
