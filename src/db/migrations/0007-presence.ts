import { Migration } from '@mikro-orm/migrations'

/**
 * Which device holds a heartbeat stream at which instance: `fleet/presence.ts` says what it is worth.
 *
 * Instances of the version before write none: their devices look offline until they are updated.
 */
export class Presence extends Migration {
  override async up(): Promise<void> {
    this.addSql(`
      create table device_presence (
        device_id text primary key references devices (id) on delete cascade,
        instance_id text not null,
        since timestamptz not null
      ) with (fillfactor = 70)`)
    this.addSql('create index device_presence_instance on device_presence (instance_id)')
  }

  override async down(): Promise<void> {
    this.addSql('drop table device_presence')
  }
}
